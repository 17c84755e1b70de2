"""Studies → a page that one can turn over, and send: ``report.html``."""
