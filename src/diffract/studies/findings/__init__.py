"""Every finding that a study can test, in the order of its report."""

from diffract.studies.finding import Finding
from diffract.studies.findings.budget import budget
from diffract.studies.findings.connectivity import connectivity
from diffract.studies.findings.evolution import evolution
from diffract.studies.findings.heads import heads
from diffract.studies.findings.rewind import rewind
from diffract.studies.findings.tracking import tracking
from diffract.studies.findings.truncation import truncation
from diffract.studies.findings.vectors import vectors

FINDINGS: tuple[Finding, ...] = (
    budget, evolution, vectors, heads, rewind, truncation, connectivity, tracking,
)  # fmt: skip

__all__ = ["FINDINGS"]
