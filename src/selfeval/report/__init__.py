"""The page of a run: `index.html`, one offline file drawn from `report.json` and `metrics/` alone.

| file | contents |
|---|---|
| `schema.py` | the contract of report.json: one model per part, one docstring per field |
| `reading.py` | reads report.json and the metrics; refuses a malformed or older file by naming the field |
| `figures.py` | writes figures and numbers the way a person reads them |
| `axes.py` | scales, ticks and tick labels |
| `charts.py` | numbers in, inline SVG out |
| `summary.py` | the two verdict sentences and the terminal's table |
| `sections.py` | the content of each section of the page |
| `page.py` | fills the template and writes `index.html` |

Nothing here computes a result: an absent figure is said to be absent.
"""
