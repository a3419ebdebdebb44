"""Every finding that a study can test, in the order of its report."""

from collections.abc import Callable

from diffract.studies.finding import Finding
from diffract.studies.findings.budget import budget
from diffract.studies.findings.connectivity import connectivity
from diffract.studies.findings.evolution import evolution
from diffract.studies.findings.heads import heads
from diffract.studies.findings.rewind import rewind
from diffract.studies.findings.tracking import tracking
from diffract.studies.findings.truncation import truncation
from diffract.studies.findings.vectors import vectors
from diffract.studies.recipe import Name
from diffract.studies.study import Study

FINDINGS: dict[Name, Callable[[Study], Finding]] = {
    "budget": budget,
    "evolution": evolution,
    "vectors": vectors,
    "heads": heads,
    "rewind": rewind,
    "truncation": truncation,
    "connectivity": connectivity,
    "tracking": tracking,
}

__all__ = ["FINDINGS"]
