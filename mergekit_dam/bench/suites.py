"""The suites by name."""

from __future__ import annotations

from mergekit_dam.bench.clip_paper import ClipPaperSuite
from mergekit_dam.bench.lm import LmSuite
from mergekit_dam.bench.suite import Suite
from mergekit_dam.bench.text import TextSuite
from mergekit_dam.bench.vision import VisionSuite

SUITES: dict[str, type[Suite]] = {suite.name: suite for suite in (VisionSuite, TextSuite, LmSuite, ClipPaperSuite)}
