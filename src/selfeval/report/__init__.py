"""The HTML page of a run: a single offline `index.html`, rendered from `report.json` and `metrics/` alone.

| file | contents |
|---|---|
| `schema.py` | the schema of report.json: one model per part, one docstring per field |
| `reading.py` | reads report.json and the metrics; rejects malformed or outdated files and names the field |
| `figures.py` | formats figures and numbers for people |
| `axes.py` | scales, ticks and tick labels |
| `charts.py` | charts as inline SVG |
| `summary.py` | the two summary sentences and the table of the terminal |
| `sections.py` | the content of each section of the page |
| `page.py` | renders the template and writes `index.html` |

Nothing here computes a result, and a missing figure is reported as not measured.
"""
