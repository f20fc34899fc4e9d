"""What the tests of gpu.py share."""

# The head of a report.
HEAD = {
    "card": "CARD",
    "date": "2026-01-02",
    "rehearsed": False,
    "versions": {"torch": "2"},
    "minutes": 10,
}
