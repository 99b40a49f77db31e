"""Style sheets and scripts of the pages."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

import selfeval.report
from selfeval.report.page import map_script
from selfeval.serve.page_access import SAFE_HEADERS
from selfeval.view.pages import PageRoute
from selfeval.view.problems import NotFoundError

__all__ = ["router"]

router = APIRouter(route_class=PageRoute)

_OWN = Path(__file__).parent / "static"
_FILES = {
    "report.css": Path(selfeval.report.__file__).parent / "templates" / "style.css",
    "map.js": map_script(),
    **{path.name: path for path in sorted(_OWN.iterdir()) if path.suffix in (".css", ".js")},
}


@router.get("/static/{name}")
def static_file(name: str) -> FileResponse:
    """Return a file of the package."""
    if name not in _FILES:
        raise NotFoundError(f"There is no file {name!r} here.")
    # The files change with the version of the package, which their addresses do not name: ask for changes every time.
    return FileResponse(_FILES[name], headers={**SAFE_HEADERS, "Cache-Control": "no-cache"})
