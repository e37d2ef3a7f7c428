"""Every contestant of every case as a pytest-benchmark entry.

    python -m pytest bench/test_cases.py -k "768x3072/M512" --benchmark-json=now.json

measures each case as it comes to it; `python -m bench --json`, `--histogram` and `--compare` run this file on what
they have measured already. Rounds are interleaved and disturbed ones are left out, see `peftkernels/cli/timing.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from bench import lineup, results, roofline
from bench.cases import Case, all_cases
from bench.plan import plan
from bench.replay import Recorded, ReplayTimer, extra_info, timer_function
from bench.runner import Measured, measure_case

_TIMER = ReplayTimer()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each contestant, those of a case one after the other."""
    recorded = _recorded(metafunc.config)
    parameters = []
    for case in all_cases() if recorded is None else recorded.cases:
        names = lineup.contestants(case) if recorded is None else recorded.measured[case.id].samples.rounds[0]
        mark = pytest.mark.benchmark(group=case.id, timer=timer_function(_TIMER))
        parameters += [pytest.param(case, name, id=f"{case.id}/{name}", marks=mark) for name in names]
    metafunc.parametrize(("case", "contestant"), parameters)


def _recorded(config: pytest.Config) -> Recorded | None:
    return next((plugin for plugin in config.pluginmanager.get_plugins() if isinstance(plugin, Recorded)), None)


@functools.lru_cache(maxsize=1)
def _measured(case: Case) -> Measured:
    (planned,) = plan([case], limit=None)
    return measure_case(case, planned.effort, _peaks(), results.origin())


@functools.lru_cache(maxsize=1)
def _peaks() -> roofline.Peaks:
    return roofline.measure_peaks()


def test_case(case: Case, contestant: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """The case's verified, undisturbed samples of this contestant."""
    recorded = _recorded(request.config)
    measured = _measured(case) if recorded is None else recorded.measured[case.id]
    seconds = measured.samples.times(contestant)
    benchmark.extra_info.update(extra_info(measured, contestant))
    _TIMER.load(seconds)
    benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1, warmup_rounds=0)
    assert benchmark.stats is None or benchmark.stats.stats.rounds == len(seconds)
