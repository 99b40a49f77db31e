"""The page of a run: `index.html`, one offline file drawn from `report.json` and `metrics/` alone.

| file | what it holds |
|---|---|
| `figures.py` | reads a figure with its interval and n; writes numbers the way a person reads them |
| `axes.py` | scales, ticks and tick labels |
| `charts.py` | numbers in, inline SVG out |
| `summary.py` | the two verdict sentences and the terminal's table |
| `sections.py` | what each section of the page shows |
| `page.py` | reads a run folder, fills the template, writes `index.html` |

Nothing here computes a result: an absent figure is said to be absent.
"""
