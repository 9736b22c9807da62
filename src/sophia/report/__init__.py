"""The report of a study: a page that needs nothing but itself, and its figures as PNGs."""

from sophia.report.page import write as write
