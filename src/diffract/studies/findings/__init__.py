"""Every finding that a study can test, in the order of its report."""

from diffract.studies.finding import Finding
from diffract.studies.findings.changes import heads, vectors
from diffract.studies.findings.editing import connectivity, rewind, truncation
from diffract.studies.findings.training import budget, evolution, tracking

FINDINGS: tuple[Finding, ...] = (
    budget, evolution, vectors, heads, rewind, truncation, connectivity, tracking,
)  # fmt: skip

__all__ = ["FINDINGS"]
