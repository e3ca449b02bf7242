"""From the evidence of an export to junit.xml for CI and report.html for people."""

from exporter.report.content import ReportContent
from exporter.report.junit import junit_xml
from exporter.report.page import environment, html
from exporter.report.plots import curve
from exporter.report.thumbnails import is_picture, thumbnails

__all__ = ["ReportContent", "curve", "environment", "html", "is_picture", "junit_xml", "thumbnails"]
