"""Makes the data sets that tests/plugin.rs judges, and the evidence of their error ratios by the formula that `kubectl synthex
explain` prints, written here a second time. Run: python3 tests/data/backtest.py"""

import json
import math
import os
import random

STEP, TICKS, START = 15, 40, 1_700_000_010
HERE = os.path.dirname(__file__)
CANARY, BASELINE = ["experts-canary-5d9c7-bbb24", "experts-canary-5d9c7-bbb25"], ["experts-baseline-7f4c8-bbb24", "experts-baseline-7f4c8-bbb25"]


def counters(pods, increments):
    """Series of counters, from one list of increments per pod."""
    series = []
    for pod, steps in zip(pods, increments):
        value, samples = 1000, [[START, 1000]]
        for tick, step in enumerate(steps, 1):
            value += step
            samples.append([START + tick * STEP, value])
        series.append({"pod": pod, "samples": samples})
    return series


def evidence(x, n, y, m, r0, p):
    """Log evidence after each tick, without the rule that a difference must matter."""
    ks = [1.25, 1.6, 2, 3, 5, 10, 30]
    weights = [0.8] * len(ks)
    told, latest = [], None
    for t, (x, n, y, m) in enumerate(zip(x, n, y, m), 1):
        u = lambda x, n: (x + 0.5) / (n - x + 0.5)
        v = lambda x, n: 1 / (x + 0.5) + 1 / (n - x + 0.5)
        beyond = lambda *pairs: 2 * math.sqrt(sum(v(*pair) for pair in pairs))
        share = lambda odds: odds / (1 + odds)
        before, latest, edge = latest, (x, n, y, m), 0
        if before:
            allowed = lambda a: n * share(
                u(a, before[1]) * math.exp(beyond((a, before[1]), (n * share(u(a, before[1])), n)))
            )
            x = min(x, max(allowed(0), allowed(before[0])))
            edge = max(0, abs(math.log(u(y, m) / u(before[2], before[3]))) - beyond(before[2:], (y, m)))
        r = r0 * math.exp(edge)
        o = lambda r, b: r * b / (1 - b + r * b)

        def times(k):
            """By what the weight of k is multiplied."""
            q = n * o(r * k, p) + m * p
            low, high = 0, 1
            for _ in range(200):
                b = (low + high) / 2
                low, high = (b, high) if n * o(r, b) + m * b < q else (low, b)
            canary = (o(r * k, p) / o(r, b)) ** x * ((1 - o(r * k, p)) / (1 - o(r, b))) ** (n - x)
            return canary * (p / b) ** y * ((1 - p) / (1 - b)) ** (m - y)

        if t > 1:
            weights = [w + 0.2 / ((t - 1) * t) for w in weights]
        weights = [w * times(k) for w, k in zip(weights, ks)]
        told.append(math.log(sum(weights) / len(weights) + 0.2 / t))
    return told


def data_set(seed, harm):
    rng = random.Random(seed)
    spread, tolerance = 0.1, 1.25
    rate = lambda arm, tick: 0.01 * (harm if arm is CANARY and tick > 10 else 1)
    total = {pod: [rng.randint(80, 120) for _ in range(TICKS)] for pod in CANARY + BASELINE}
    errors = {
        pod: [sum(rng.random() < rate(arm, tick) for _ in range(total[pod][tick])) for tick in range(TICKS)]
        for arm in (CANARY, BASELINE)
        for pod in arm
    }
    pods = CANARY + BASELINE
    of = lambda counts: counters(pods, [counts[pod] for pod in pods])
    column = lambda arm, counts: [sum(counts[pod][tick] for pod in arm) for tick in range(TICKS)]
    r0 = max(tolerance, math.exp(3.45 * spread * math.sqrt(1 / 2 + 1 / 2)))
    told = evidence(
        column(CANARY, errors), column(CANARY, total), column(BASELINE, errors), column(BASELINE, total), r0, 0.01
    )
    memory = lambda pod: [[START + t * STEP, 1e8 * (1 + 0.001 * rng.random())] for t in range(TICKS + 1)]
    ticks = {"from": START, "until": START + TICKS * STEP}
    learned = {"track": "Production", "until": START, "pods": 8}
    whole = {
        "version": 1,
        "rollout": "shop/experts",
        "stage": "canary",
        "attempt": 1,
        "stages": 5,
        "step": STEP,
        "bake": TICKS,
        "arms": {
            "namespace": "shop",
            "canary": {"deployment": "experts-canary", "pods": 2},
            "baseline": {"deployment": "experts-baseline", "pods": 2},
        },
        "kpis": [
            {
                "owner": "connections",
                "definition": {
                    "name": "errors",
                    "errorRatio": {
                        "errors": "errors_total{$arm}",
                        "total": "requests_total{$arm}",
                        "tolerance": tolerance,
                        "minimumEffect": 0.001,
                    },
                },
                "preflight": {**learned, "kpi": "errors", "spread": [spread], "shares": [0.01]},
                **ticks,
                "queries": [{"series": of(errors)}, {"series": of(total)}],
            },
            {
                "definition": {"name": "memory", "gauge": {"query": "memory_bytes{$arm}"}},
                "preflight": {**learned, "kpi": "memory", "spread": [0.05, 5e6]},
                **ticks,
                "queries": [{"series": [{"pod": pod, "samples": memory(pod)} for pod in pods]}],
            },
            {
                "definition": {
                    "name": "hits",
                    "observeOnly": True,
                    "threshold": {"query": "hits{$arm}", "min": 0.8, "consecutive": 3},
                },
                **ticks,
                "queries": [
                    {"series": [{"samples": [[START + STEP, "NaN"], [START + 2 * STEP, 0.9], [START + 3 * STEP, 0.7]]}]},
                    {"series": []},
                ],
            },
        ],
    }
    return whole, told


def write(name, value):
    with open(os.path.join(HERE, name), "w") as file:
        json.dump(value, file, separators=(",", ":"))
        file.write("\n")


expected = {}
for name, harm in [("alarm", 4), ("healthy", 1)]:
    whole, expected[name] = data_set(7, harm)
    write(f"backtest-{name}.json", whole)
write("backtest-expected.json", expected)
