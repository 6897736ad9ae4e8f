"""How an index stands: its lists and their drift, whether FAISS and Lance agree, and what changed since another generation."""

from pipelines.health.measuring import Asking, Compared, Report, measure
from pipelines.health.page import page
from pipelines.health.questions import Subject, read_texts
from pipelines.health.text import report_text

__all__ = ["Asking", "Compared", "Report", "Subject", "measure", "page", "read_texts", "report_text"]
