"""report.html: what a run did, in one file that opens offline and can be sent to somebody.

The charts are drawn in the browser by a small script of our own (charts.js) as inline SVG.
plotly.js would add 4.8 MB to every report and knows nothing of the page's light and dark colours;
matplotlib's SVGs are fixed in size, colour and axis, so they could neither follow a phone's width
nor switch from iterations to minutes. Everything that has to survive without scripts (verdict,
numbers, images, bars, config) is plain HTML, and the page forbids itself any request by its content
security policy.
"""

from tempflow.run.report.comparison import write_comparison
from tempflow.run.report.page import write_report

__all__ = ["write_comparison", "write_report"]
