// Refresh the parts of a page that change: <div data-live="2"> is fetched again every 2 seconds and replaced if it changed.
"use strict";
