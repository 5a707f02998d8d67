"""Benchmarks that can be believed: what `fastcnn bench` and `pytest bench/` share.

A suite yields cases; a case is a piece of work that competitors do; a race times a case's competitors, after
each has shown that its result is right. Reports print races, compare them with targets and keep them.
"""

from fastcnn.benchmark.case import Budget, Case, Competitor, Work
from fastcnn.benchmark.race import Race, RaceResult
from fastcnn.benchmark.targets import SuiteResult, Target
