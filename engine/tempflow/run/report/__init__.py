"""report.html: what a run did, in one file that opens offline and can be sent to somebody.

A small script (charts.js) draws the charts in the browser as inline SVG. plotly.js would add 4.8 MB
to every report and does not know the page's light and dark colors. matplotlib's SVGs have a fixed
size, color and axis, so they can neither fit a phone nor switch from iterations to minutes. What
must be readable without scripts (verdict, numbers, images, bars, config) is plain HTML. The content
security policy of the page forbids all requests.
"""

from tempflow.run.report.comparison import write_comparison
from tempflow.run.report.page import write_report

__all__ = ["write_comparison", "write_report"]
