#!/usr/bin/env python3
"""Computes the evidence of error ratios independently of the operator: writes eprocess.json beside this file.

The operator adds up logarithms of ratios in f64. Here every tick's factor is the quotient of two products of binomial probabilities
(whose coefficients are the same), the factors are multiplied, and the mixture is averaged, all in decimals of 60 digits; one
logarithm is taken at the end. The shares of the null hypothesis are found by bisection. Where nothing is known of the usual share,
the factor is that of the division of the events of both arms. The prior over the tick at which harm begins is written out as a sum
over all beginnings, each with a product of its own. Plain Python 3, no packages.
"""

import json
import pathlib
import random
from decimal import Decimal, getcontext

getcontext().prec = 60
GRID = [Decimal(g) for g in ("1.25", "1.6", "2", "3", "5", "10", "30")]


def tolerated(r0, tau, kc, kb):
    spread = Decimal("3.45") * Decimal(tau) * (Decimal(1) / kc + Decimal(1) / kb).sqrt()
    return max(Decimal(r0), spread.exp())


def prior(n):
    """Probability that harm begins with tick n."""
    return Decimal(4) / 5 if n == 1 else Decimal(1) / 5 / ((n - 1) * n)


def binomial(k, m, share):
    return share**k * (1 - share) ** (m - k)


def odds_times(ratio, share):
    return ratio * share / (1 - share + ratio * share)


def factor(xc, nc, xb, nb, r0, r1, usual):
    """Likelihood ratio of a tick."""
    if not usual:
        share = lambda r: r * nc / (r * nc + nb)
        return binomial(xc, xc + xb, share(r1)) / binomial(xc, xc + xb, share(r0))
    c1, b1 = odds_times(r1, usual), usual
    low, high = Decimal(0), Decimal(1)
    for _ in range(100):
        middle = (low + high) / 2
        if nc * odds_times(r0, middle) + nb * middle < nc * c1 + nb * b1:
            low = middle
        else:
            high = middle
    c0, b0 = odds_times(r0, low), low
    return binomial(xc, nc, c1) * binomial(xb, nb, b1) / (binomial(xc, nc, c0) * binomial(xb, nb, b0))


HALF = Decimal(1) / 2


def odds(x, n):
    return (x + HALF) / (n - x + HALF)


def steady(before, tick):
    """The canary's events that count, and the factor by which more is tolerated, after the tick before."""
    (oxc, onc, oxb, onb), (xc, nc, xb, nb) = ([Decimal(count) for count in row] for row in (before, tick))
    variance = lambda x, n: 1 / (x + HALF) + 1 / (n - x + HALF)
    beyond = lambda *pairs: 2 * sum(variance(*pair) for pair in pairs).sqrt()
    share = lambda odds: odds / (1 + odds)
    if onc:

        def allowed(x):
            now = odds(x, onc)
            return nc * share(now * beyond((x, onc), (nc * share(now), nc)).exp())

        xc = min(xc, max(allowed(Decimal(0)), allowed(oxc)))
    edge = Decimal(0)
    if onb and nb:
        edge = max(edge, abs((odds(xb, nb) / odds(oxb, onb)).ln()) - beyond((oxb, onb), (xb, nb)))
    return xc, edge.exp()


def matters(xc, nc, xb, nb, ticks, r0, effect):
    """Whether the arms differ by what matters, and by more than is tolerated, the more so in the first ticks."""
    if not nc or not nb or xc / nc - xb / nb < effect:
        return False
    return (odds(xc, nc) / odds(xb, nb)).ln() >= (1 + Decimal("0.75") / Decimal(ticks).sqrt()) * r0.ln()


def evidence(ticks, r0, effect, usual):
    """The natural logarithm of the evidence after each tick, and its peak while the difference mattered."""
    # For each beginning: its prior probability, and for each ratio the product of the factors since.
    begun = []
    sums, recent = [Decimal(0)] * 4, [Decimal(0)] * 4
    waiting, before = None, (0, 0, 0, 0)
    logs, peak = [], Decimal(0)
    for n, tick in enumerate(ticks, 1):
        begun.append((prior(n), [Decimal(1)] * len(GRID)))
        sums = [a + b for a, b in zip(sums, tick)]
        recent = [Decimal("0.9") * a + b for a, b in zip(recent, tick)]
        counted, edge = steady(before, tick)
        before = tick
        xc, nc, xb, nb = [a + b for a, b in zip((counted, *tick[1:]), waiting or (0, 0, 0, 0))]
        waiting = None
        if nc == 0 or nb == 0:
            waiting = tick if tick[1] or tick[3] else None
        elif xc + xb:
            r = r0 * edge
            factors = [factor(xc, Decimal(nc), xb, Decimal(nb), r, r * g, usual) for g in GRID]
            for _, wealth in begun:
                wealth[:] = [w * f for w, f in zip(wealth, factors)]
        mixed = sum(probability * sum(wealth) / len(GRID) for probability, wealth in begun)
        log = (mixed + 1 - sum(probability for probability, _ in begun)).ln()
        logs.append(log)
        if matters(*sums, n, r0, effect) or matters(*recent, min(n, 10), r0, effect):
            peak = max(peak, log)
    return [float(log) for log in logs], float(peak)


def stream(seed, ticks, nc, nb, pc, pb):
    rng = random.Random(seed)
    arm = lambda n, p: (sum(rng.random() < p for _ in range(n)), n)
    rows = []
    for _ in range(ticks):
        a, b = rng.randint(nc // 2, nc), rng.randint(nb // 2, nb)
        (xc, a), (xb, b) = arm(a, pc), arm(b, pb)
        rows.append((xc, a, xb, b))
    return rows


CASES = [
    ("no difference", 1.25, 0.001, 10, 10, stream(1, 60, 200, 200, 0.02, 0.02)),
    ("twice as bad, many pods", 1.25, 0.001, 100, 100, stream(2, 40, 400, 400, 0.04, 0.02)),
    ("five times as bad, a tenth of the traffic", 1.25, 0.001, 2, 18, stream(3, 60, 40, 400, 0.05, 0.01)),
    ("harm without a single baseline error", 1.25, 0.001, 1, 1, stream(4, 30, 60, 60, 0.4, 0.0)),
    ("hold-back", 1.25, 0.001, 10, 1, stream(5, 40, 400, 40, 0.3, 0.01)),
    ("the canary is better", 1.25, 0.001, 5, 5, stream(6, 40, 200, 200, 0.01, 0.1)),
    ("wide tolerance", 10.0, 0.001, 5, 5, stream(7, 40, 200, 200, 0.3, 0.01)),
    ("harm below the minimum effect", 1.25, 0.5, 50, 50, stream(8, 40, 300, 300, 0.2, 0.01)),
    ("arms scraped in turn", 1.25, 0.001, 1, 1, [(3, 20, 0, 0), (0, 0, 0, 25)] * 20),
    ("one arm idle for long", 1.25, 0.001, 1, 1, [(0, 0, 1, 30)] * 10 + [(9, 30, 0, 30)] * 5 + [(5, 5, 0, 0)] * 3),
    ("every request fails on both", 1.25, 0.001, 3, 3, [(50, 50, 70, 70)] * 10),
    ("harm begins late", 1.25, 0.001, 10, 10, stream(9, 150, 200, 200, 0.02, 0.02) + stream(10, 30, 200, 200, 0.3, 0.02)),
    ("nothing ever fails", 1.25, 0.001, 3, 3, [(0, 50, 0, 70)] * 10),
    ("a moment of harm", 1.25, 0.001, 50, 50, stream(11, 60, 400, 400, 0.02, 0.02) + [(40, 300, 6, 300)] + stream(12, 9, 400, 400, 0.02, 0.02)),
    ("harm among many", 1.25, 0.005, 50, 50, stream(13, 20, 150, 600, 0.55, 0.35), 0.35),
    ("no harm among many", 1.25, 0.005, 50, 50, stream(14, 40, 150, 600, 0.35, 0.35), 0.35),
    ("among many, of which fewer were expected", 1.25, 0.005, 50, 50, stream(15, 20, 150, 600, 0.9, 0.8), 0.2),
    ("few, and more were expected", 1.25, 0.001, 100, 100, stream(16, 30, 300, 300, 0.06, 0.02), 0.5),
    ("a burst of both arms", 1.25, 0.005, 50, 50, stream(17, 10, 300, 300, 0.3, 0.3) + stream(18, 10, 300, 300, 0.9, 0.9), 0.3),
]


def main():
    out = []
    for name, r0, effect, kc, kb, ticks, *usual in CASES:
        usual = usual[0] if usual else 0
        logs, peak = evidence(ticks, tolerated(str(r0), "0.5", kc, kb), Decimal(str(effect)), Decimal(str(usual)))
        out.append(
            {
                "name": name,
                "tolerance": r0,
                "minimumEffect": effect,
                "usual": usual,
                "canaryPods": kc,
                "baselinePods": kb,
                "ticks": ticks,
                "logEvidence": logs,
                "peak": peak,
            }
        )
    lines = ",\n".join(json.dumps(case) for case in out)
    pathlib.Path(__file__).with_suffix(".json").write_text(f"[\n{lines}\n]\n")


main()
