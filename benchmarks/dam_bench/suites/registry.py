"""Register the suites by name."""

from __future__ import annotations

from dam_bench.suites.base import Suite
from dam_bench.suites.clip_paper import ClipPaperSuite
from dam_bench.suites.lm import LmSuite
from dam_bench.suites.smollm import SmolLmSuite
from dam_bench.suites.text import TextSuite
from dam_bench.suites.vision import VisionSuite

SUITES: dict[str, type[Suite]] = {
    suite.name: suite for suite in (VisionSuite, TextSuite, LmSuite, SmolLmSuite, ClipPaperSuite)
}
