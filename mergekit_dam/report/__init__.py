"""`dam/report.html` and `dam/report.json`: one page about a merge that needs nothing but itself."""

from __future__ import annotations

from mergekit_dam.report.write import REPORT_HTML, REPORT_JSON, write_report

__all__ = ["REPORT_HTML", "REPORT_JSON", "write_report"]
