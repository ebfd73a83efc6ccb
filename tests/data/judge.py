#!/usr/bin/env python3
"""Computes what the judge should say, independently of the operator: writes judge.json beside this file.

Tails of Student's t, slopes, intervals and pooled estimates come from scipy and statsmodels; what is a formula of our own (the
between-pod spread, alpha) is written out in numpy from the notes; the smallest detectable ratios are found by simulation of the
test (for shares) and from the noncentral t (for gauges). Needs numpy 2.4, scipy 1.17 and statsmodels 0.15.
"""

import json
import math
import pathlib

import numpy as np
from scipy import optimize, special, stats
from statsmodels.stats.meta_analysis import combine_effects
from statsmodels.stats.rates import confint_poisson_2indep

STEP = 15


def digits(values, n=6):
    """Values as they are written down, None for none."""
    return [None if v is None else float(f"{v:.{n}g}") for v in values]


# --- A gauge: Student's t on the pods' means, and on their slopes -------------------------------------------------------------


def surprise(t, df):
    return min(-stats.t.logsf(t, df), 700.0)


def level_share(q):
    """Three quarters of alpha: nine tenths of it for the first look, 1/((q-1)q) of the rest for a later one."""
    return math.log(0.75 * (0.9 if q == 1 else 0.1 / ((q - 1) * q)))


def slope_share(q):
    """The last quarter, times 6/(pi^2 q^2)."""
    return math.log(0.25 * 6 / (math.pi**2 * q**2))


def fresh(case):
    """Ticks at which both arms have a sample; the others count for nothing."""
    there = lambda pods, i: any(pod[i] is not None for pod in pods)
    return [i + 1 for i in range(len(case["canary"][0])) if there(case["canary"], i) and there(case["baseline"], i)]


def seen(case, ticks):
    """Samples of each pod of both arms at these ticks."""
    arms = case["canary"], case["baseline"]
    return [[[(i, pod[i - 1]) for i in ticks if pod[i - 1] is not None] for pod in pods] for pods in arms]


def means(pods, plain):
    pods = [np.array([v for _, v in pod]) for pod in pods if len(pod) >= 4]
    return np.array([pod.mean() if plain else np.log(pod).mean() for pod in pods])


def level(case, canary, baseline):
    plain = any(v <= 0 for pod in canary + baseline for _, v in pod)
    c, b = means(canary, plain), means(baseline, plain)
    if not len(c) or not len(b):
        return None
    sign = -1 if case["higherIsBetter"] else 1
    tolerated = case["tolerance"] * abs(b.mean()) if plain else math.log(1 + case["tolerance"])
    d0 = max(case["preflightPods"] - 1, 0)
    s0 = case["spread"][1 if plain else 0] if d0 else 0.0
    df = d0 + len(b) - 1
    variance = (d0 * s0**2 + (len(b) - 1) * (b.var(ddof=1) if len(b) > 1 else 0.0)) / df if df else 0.0
    # Never less than the least of any gauge, nor than the squared standard error of the mean of a canary pod: about a straight line,
    # where there are logarithms.
    def sem(pod):
        t, y = np.array([i for i, _ in pod]), np.array([v for _, v in pod])
        if plain:
            return stats.sem(y)
        line = stats.linregress(t, np.log(y))
        return math.sqrt(np.sum((np.log(y) - line.intercept - line.slope * t) ** 2) / (len(y) - 2) / len(y))

    least = 0.05 * (max(abs(c.mean()), abs(b.mean())) if plain else 1.0)
    variance = max(variance, least**2, np.mean([sem(pod) ** 2 for pod in canary if len(pod) >= 4]))
    return c, b, plain, variance, df, sign * (c.mean() - b.mean()) - tolerated


def slope(case, canary, baseline):
    def slopes(pods):
        pods = [pod for pod in pods if len(pod) >= 4 and all(v > 0 for _, v in pod)]
        lines = [stats.linregress([i * STEP / 3600 for i, _ in p], [math.log(v) for _, v in p]) for p in pods]
        return np.array([line.slope for line in lines]), np.array([line.stderr for line in lines])

    (c, own), (b, _) = slopes(canary), slopes(baseline)
    if not len(c) or len(b) < 3:
        return None
    sign = -1 if case["higherIsBetter"] else 1
    # Never less than what every fourth sample of a canary pod tells.
    error = math.sqrt(max(b.var(ddof=1), 4 * np.mean(own**2))) * math.sqrt(1 / len(c) + 1 / len(b))
    return (sign * (c.mean() - b.mean()) - 0.10) / error, len(b) - 1


def gauge(case):
    ticks, bake = fresh(case), case["bake"]
    rises, looks, peak = [], 0, 0.0
    for n, tick in enumerate(ticks, 1):
        before = peak
        if n in (4, 8, 16, 32, 64, 128) or n == bake and n >= 4:
            looks += 1
            arms = seen(case, ticks[:n])
            found = level(case, *arms)
            if found and found[4] >= 4:
                c, b, _, variance, df, beyond = found
                t = beyond / math.sqrt(variance * (1 / len(c) + 1 / len(b)))
                if t > 0:
                    peak = max(peak, surprise(t, df) + level_share(looks))
            grown = slope(case, *arms) if n >= 32 or n == bake else None
            if grown and grown[0] > 0:
                peak = max(peak, surprise(*grown) + slope_share(max(looks - (2 if bake < 32 else 3), 1)))
        if peak > before:
            rises.append([tick, float(f"{peak:.13g}")])
    return rises, gauge_change(case), gauge_detectable(case)


def gauge_change(case):
    """The 95 % interval of the relative change: the pooled two-sample t, with the pre-flight's variance as further data."""
    c, b, plain, variance, df, _ = level(case, *seen(case, fresh(case)))
    all_df = df + len(c) - 1
    # Where the variance is the baseline's own, it is the plain two-sample test.
    if case["preflightPods"] < 2 and len(c) > 1 and len(b) > 1 and math.isclose(variance, b.var(ddof=1)):
        interval = stats.ttest_ind(c, b, equal_var=True).confidence_interval(0.95)
        low, high = interval.low, interval.high
    else:
        pooled = (variance * df + (len(c) - 1) * (c.var(ddof=1) if len(c) > 1 else 0.0)) / all_df
        half = stats.t.ppf(0.975, all_df) * math.sqrt(pooled * (1 / len(c) + 1 / len(b)))
        middle = c.mean() - b.mean()
        low, high = middle - half, middle + half
    values = [c.mean() - b.mean(), low, high]
    return [v / abs(b.mean()) if plain else math.expm1(v) for v in values]


def gauge_detectable(case):
    """The ratio that the first look finds with a probability of 80 %: the noncentral t."""
    found = level(case, *seen(case, fresh(case)))
    if not found or found[4] < 4 or found[2]:
        return None
    c, b, _, variance, df, _ = found
    at = stats.t.isf(math.exp(-(case["alarmAt"] - level_share(1))), df)
    error = math.sqrt(variance * (1 / len(c) + 1 / len(b)))
    shift = optimize.brentq(lambda shift: stats.nct.sf(at, df, shift) - 0.8, at - 3, at + 40)
    sign = -1 if case["higherIsBetter"] else 1
    return math.exp(sign * (math.log(1 + case["tolerance"]) + shift * error))


def pods(rng, n, ticks, centre=100.0, between=0.05, within=0.02, growth=0.0, gaps=0.0):
    """Values of pods around a centre; `growth` per hour on the log scale."""
    hours = np.arange(1, ticks + 1) * STEP / 3600
    rows = []
    for _ in range(n):
        row = centre * np.exp(between * rng.standard_normal() + within * rng.standard_normal(ticks) + growth * hours)
        rows.append(digits([None if rng.random() < gaps else v for v in row], 5))
    return rows


def gauges():
    def case(name, canary, baseline, preflight=(20, 0.05), tolerance=0.05, bake=116, higher=False, plain=5.0):
        return {
            "name": name,
            "higherIsBetter": higher,
            "tolerance": tolerance,
            "preflightPods": preflight[0],
            "spread": [preflight[1], plain],
            "bake": bake,
            "alarmAt": 8.281,
            "canary": canary,
            "baseline": baseline,
        }

    rng = np.random.default_rng(20261124)
    flat = lambda value, n: [[value + 0.001 * i] * 8 for i in range(n)]
    steady = [
        # Constant values, so that t runs from the middle into the far tail, with few and many degrees of freedom.
        case(f"t by {name}, {d0 + 3} degrees of freedom", flat(v, 2), flat(100.0, 4), (d0 + 1, 0.05), bake=200)
        for name, v in (("1.06", 106.0), ("1.2", 120.0), ("2", 200.0), ("1e6", 1e8))
        for d0 in (1, 19, 199)
    ]
    signed = [digits(rng.normal(0.0, 3.0, 40), 4) for _ in range(8)]
    worse = [digits(rng.normal(6.0, 3.0, 40), 4) for _ in range(3)]
    cases = steady + [
        case("no difference", pods(rng, 2, 116), pods(rng, 18, 116)),
        case("a quarter more", pods(rng, 2, 40, 125.0), pods(rng, 18, 40)),
        case("twice as much in one pod", pods(rng, 1, 20, 200.0), pods(rng, 19, 20)),
        case("better", pods(rng, 3, 40, 50.0), pods(rng, 17, 40)),
        case("a leak of a factor of two an hour", pods(rng, 3, 116, growth=math.log(2)), pods(rng, 10, 116)),
        case("a leak of both arms", pods(rng, 3, 116, growth=0.5), pods(rng, 10, 116, growth=0.5)),
        case("less, where more is better", pods(rng, 5, 40, 70.0), pods(rng, 5, 40), higher=True),
        case("shrinking, where more is better", pods(rng, 4, 70, growth=-1.0), pods(rng, 6, 70), higher=True),
        case("no pre-flight", pods(rng, 4, 40, 160.0), pods(rng, 8, 40), (0, 0.0)),
        case("no pre-flight and too few pods", pods(rng, 2, 20, 300.0), pods(rng, 2, 20), (0, 0.0)),
        case("samples are missing", pods(rng, 4, 70, 140.0, gaps=0.5), pods(rng, 8, 70, gaps=0.5)),
        case("a look at the end of the bake", pods(rng, 3, 24, 130.0), pods(rng, 9, 24), bake=22),
        case("signed values", worse, signed, (10, 0.05), plain=2.0),
        case("a wide tolerance", pods(rng, 3, 40, 150.0), pods(rng, 9, 40), tolerance=0.5),
    ]
    for case in cases:
        # Only where it rises: the tick, and the peak from then on.
        case["peaks"], change, detectable = gauge(case)
        case["change"] = digits(change, 8)
        case["detectable"] = detectable
    return cases


# --- The pre-flight ------------------------------------------------------------------------------------------------------------


def increases(row, there):
    """Increases of a raw counter between neighbouring samples; `there` says where its pod was scraped."""
    out = []
    for i in range(1, len(row)):
        now, before = row[i], row[i - 1]
        if before is None and there[i - 1]:
            before = 0  # The counter did not exist yet.
        missing = now is None or before is None
        out.append(math.nan if missing else (now - before if now >= before else now))
    return np.array(out, dtype=float)


def tau(errors, total):
    """Pods told apart and the standard deviation of their log odds, by moments."""
    there = [[v is not None for v in row] for row in total]
    n = np.array([increases(row, up) for row, up in zip(total, there)])
    x = np.nan_to_num(np.array([increases(row, up) for row, up in zip(errors, there)]))
    enough = (~np.isnan(n)).sum(axis=1) >= 5
    n, x = n[enough], x[enough]
    if len(n) < 3 or not np.nansum(n) > 0:
        return 0, 0.5
    x = np.where(np.isnan(n), np.nan, x)
    e = n * np.nansum(x, axis=0) / np.nansum(n, axis=0)
    c = (len(n) - 1) / len(n)
    v = e * (1 - np.nansum(x, axis=0) / np.nansum(n, axis=0))
    v2 = np.nansum(v**2)
    # What counting alone varies by, in its own standard deviation, is taken off; a count grows by v with the log odds.
    chance = math.sqrt(np.nansum(2 * v**2 + v))
    excess = (np.nansum((x - e) ** 2) - c * np.nansum(v) - chance) / (c * v2) if v2 > 0 else 0.0
    return len(n), float(np.clip(math.sqrt(max(excess, 0)), 0.085, 0.5))


def counters(rng, pods, sd, mean=20.0, share=0.02):
    errors, total = [], []
    for _ in range(pods):
        rate = share * math.exp(sd * rng.standard_normal())
        n = rng.poisson(mean / share, 11)
        x = rng.binomial(n, min(rate, 0.9))
        total.append([int(v) for v in np.cumsum(n)])
        errors.append([int(v) for v in np.cumsum(x)])
    return errors, total


def spreads():
    rng = np.random.default_rng(4)
    cases = []

    def case(name, errors, total):
        pods, spread = tau(errors, total)
        cases.append({"name": name, "errors": errors, "total": total, "pods": pods, "spread": spread})

    case("alike", *counters(rng, 10, 0.0))
    for sd in (0.2, 0.3, 0.4):
        case(f"unlike by {sd}", *counters(rng, 12, sd, mean=200.0))
    case("most unlike", *counters(rng, 12, 1.2, mean=200.0))
    case("a third of all", *counters(rng, 12, 0.2, mean=600.0, share=0.33))
    case("two pods", *counters(rng, 2, 0.3))
    case("three pods", *counters(rng, 3, 0.4, mean=500.0))
    errors, total = counters(rng, 6, 0.0)
    case("no errors", [[0] * 11 for _ in errors], total)
    errors, total = counters(rng, 8, 0.3, mean=200.0)
    for rows in (errors, total):
        # A restart of one pod, a gap in another, one that is young, one too young to count.
        rows[0][6:] = [v - rows[0][5] for v in rows[0][6:]]
        rows[1][4:6] = [None, None]
        rows[2][:3] = [None] * 3
        rows[3][:7] = [None] * 7
    case("restarts and gaps", errors, total)
    errors, total = counters(rng, 8, 0.3, mean=200.0)
    for row in errors[:4]:
        first = row[1]
        row[:] = [None] * 2 + [v - first for v in row[2:]]
    case("counters that begin with the first error", errors, total)
    return cases


def gauge_spreads():
    rng = np.random.default_rng(5)
    cases = []
    for name, values in (
        ("memory", pods(rng, 20, 11, 2e8, 0.12, 0.01)),
        ("nearly alike", pods(rng, 20, 11, 2e8, 0.01, 0.01)),
        ("three pods", pods(rng, 3, 11, 50.0, 0.3, 0.01)),
        ("two pods", pods(rng, 2, 11)),
        ("gaps", pods(rng, 8, 11, 100.0, 0.2, 0.02, gaps=0.35)),
        ("signed", [digits(rng.normal(1.0, 2.0, 11)) for _ in range(9)]),
    ):
        whole = [np.array([v for v in pod if v is not None]) for pod in values]
        whole = [pod for pod in whole if len(pod) >= 5]
        spread = []
        if len(whole) >= 3:
            plain = np.array([pod.mean() for pod in whole])
            logs = [np.log(pod).mean() for pod in whole] if all((pod > 0).all() for pod in whole) else None
            spread = [
                max(np.std(logs, ddof=1), 0.05) if logs else 0.5,
                max(np.std(plain, ddof=1), 0.05 * abs(plain.mean())),
            ]
        cases.append(
            {"name": name, "values": values, "pods": len(whole) if spread else 0, "spread": [float(s) for s in spread]}
        )
    return cases


def bounds():
    rng = np.random.default_rng(6)
    les = ["0.05", "0.1", "0.2", "0.3", "0.5", "0.75", "1.0", "2.5", "5"]
    edges = np.array([float(le) for le in les])
    cases = []
    for name, median, sigma in (("plain", 0.08, 0.6), ("long tail", 0.05, 1.3), ("all fast", 0.001, 0.2), ("all slow", 60.0, 0.1)):
        times = np.exp(math.log(median) + sigma * rng.standard_normal(40_000))
        # The 95 % and the 99 % quantile of what was seen lie above the bounds: numpy's order statistics, not a walk over buckets.
        found = []
        for share in (0.25, 0.05, 0.01):
            slow = np.sort(times)[::-1][math.ceil(share * len(times)) - 1]
            below = np.searchsorted(edges, slow, side="left")
            found.append(les[max(below - 1, 0)])
        if found[0] == found[-1]:
            # Wide buckets: the next larger bound shows what is rare.
            found.append(les[min(les.index(found[0]) + 1, len(les) - 1)])
        counts = [[int((times[pod::4] <= edge).sum()) for edge in edges] + [len(times[pod::4])] for pod in range(4)]
        found = list(dict.fromkeys(found))
        shares = [float((times > float(le)).mean()) for le in found]
        cases.append({"name": name, "les": les, "counts": counts, "bounds": found, "shares": shares})
    return cases


# --- What was brought, and what can be found ------------------------------------------------------------------------------------


def share_changes():
    rows = []
    for (x, n), (y, m), spread, kc, kb in (
        ((50, 10_000), (500, 90_000), 0.1, 2, 18),
        ((0, 1_000), (12, 9_000), 0.1, 2, 18),
        ((7, 1_000), (0, 9_000), 0.5, 1, 19),
        ((400, 20_000), (800, 20_000), 0.0, 10, 10),
        ((1, 3), (2, 5), 0.3, 1, 1),
    ):
        interval = confint_poisson_2indep(x, n + 1, y, m + 1, method="waldcc", compare="ratio")
        low, high = np.log(interval)
        middle, sampling = 0.5 * (low + high), (high - low) / (2 * stats.norm.ppf(0.975))
        # The spread is one of log odds.
        half = stats.norm.ppf(0.975) * math.hypot(sampling, spread * (1 - y / m) * math.sqrt(1 / kc + 1 / kb))
        change = [float(math.expm1(v)) for v in (middle, middle - half, middle + half)]
        rows.append({"canary": [x, n], "baseline": [y, m], "spread": spread, "pods": [kc, kb], "change": change})
    return rows


def pooled():
    cases = []
    for effects, errors in (
        ([-0.4, -0.3, -0.5], [0.1, 0.05, 0.2]),
        ([0.02, -0.7], [0.3, 0.01]),
        ([0.1, 0.1, 0.2, 0.0], [0.05] * 4),
    ):
        fixed = combine_effects(np.array(effects), np.array(errors) ** 2, method_re="dl")
        low, high = fixed.conf_int(alpha=0.05, use_t=False)[0]
        z = stats.norm.ppf(0.975)
        stages = [[math.expm1(e), math.expm1(e - z * s), math.expm1(e + z * s)] for e, s in zip(effects, errors)]
        overall = [math.expm1(v) for v in (fixed.mean_effect_fe, low, high)]
        cases.append({"stages": stages, "overall": overall})
    return cases


def alarms():
    rows = []
    for probability, share, stages, attempt in ((0.01, 1, 1, 1), (0.01, 0.25, 6, 1), (0.05, 0.1, 5, 3), (0.001, 0.01, 20, 40)):
        alpha = probability * share / stages * (0.9 if attempt == 1 else 0.1 / ((attempt - 1) * attempt))
        rows.append([probability, share, stages, attempt, -math.log(alpha)])
    return rows


GRID = np.array([1.25, 1.6, 2, 3, 5, 10, 30])
# Prior probability that harm begins with the first tick; the rest is spread over the later ones.
FROM_THE_START = 0.8


def power(ratio, case, runs):
    """How often the test alarms, by simulation of whole stages: the mixture over ratios and beginnings."""
    rng = np.random.default_rng(7)
    kc, kb = case["pods"]
    ticks = case["bake"]
    nc, nb = (round(case["requests"] * k * STEP) for k in (kc, kb))
    r0 = max(case["tolerance"], math.exp(3.45 * case["spread"] * math.sqrt(1 / kc + 1 / kb)))
    p = case["share"]
    odds_times = lambda ratio, share: ratio * share / (1 - share + ratio * share)
    x = rng.binomial(nc, odds_times(ratio, p), (runs, ticks)).astype(float)
    y = rng.binomial(nb, case["share"], (runs, ticks)).astype(float)
    c1 = odds_times(r0 * GRID, p)
    b0 = np.array(
        [optimize.brentq(lambda b: nc * (odds_times(r0, b) - c) + nb * (b - p), 0, 1, xtol=1e-15) for c in c1]
    )
    c0 = odds_times(r0, b0)
    score = lambda k, n, p1, p0: k * np.log(p1 / p0) + (n - k) * np.log((1 - p1) / (1 - p0))
    log = np.full((runs, len(GRID)), math.log(FROM_THE_START))
    found = np.zeros(runs, dtype=bool)
    sums = np.zeros((runs, 2))
    for tick in range(1, ticks + 1):
        if tick > 1:
            log = np.logaddexp(log, math.log((1 - FROM_THE_START) / ((tick - 1) * tick)))
        log += score(x[:, tick - 1 : tick], nc, c1, c0) + score(y[:, tick - 1 : tick], nb, p, b0)
        sums += np.stack([x[:, tick - 1], y[:, tick - 1]], axis=1)
        later = math.log((1 - FROM_THE_START) / tick)
        evidence = np.logaddexp(special.logsumexp(log, axis=1) - math.log(len(GRID)), later)
        matters = sums[:, 0] / (nc * tick) - sums[:, 1] / (nb * tick) >= case["minimumEffect"]
        odds = (sums + 0.5) / (np.array([nc, nb]) * tick - sums + 0.5)
        matters &= np.log(odds[:, 0] / odds[:, 1]) >= (1 + 0.75 / math.sqrt(tick)) * math.log(r0)
        found |= (evidence >= case["alarmAt"]) & matters
    return found.mean()


def detectables():
    cases = []
    for requests, share, kc, kb, spread, tolerance, bake in (
        (2.5, 0.005, 2, 18, 0.1, 1.25, 116),
        (25.0, 0.005, 2, 18, 0.1, 1.25, 116),
        (25.0, 0.005, 10, 10, 0.1, 1.25, 116),
        (25.0, 0.005, 19, 1, 0.1, 1.25, 116),
        (5.0, 0.05, 1, 19, 0.2, 1.25, 60),
        (0.5, 0.02, 5, 15, 0.3, 2.0, 240),
        (2.5, 0.3, 2, 18, 0.1, 1.25, 116),
    ):
        case = {
            "requests": requests,
            "share": share,
            "pods": [kc, kb],
            "spread": spread,
            "tolerance": tolerance,
            "minimumEffect": 0.001,
            "bake": bake,
            "alarmAt": 8.281,
        }
        low, high = 1.0, 200.0
        for _ in range(14):
            middle = math.sqrt(low * high)
            if power(middle, case, 2000) >= 0.8:
                high = middle
            else:
                low = middle
        case["detectable"] = float(f"{math.sqrt(low * high):.4g}")
        cases.append(case)
    return cases


def main():
    tables = {
        "gauges": gauges(),
        "spreads": spreads(),
        "gaugeSpreads": gauge_spreads(),
        "bounds": bounds(),
        "shareChanges": share_changes(),
        "pooled": pooled(),
        "alarms": alarms(),
        "detectables": detectables(),
    }
    parts = []
    for name, rows in tables.items():
        lines = ",\n".join(json.dumps(row) for row in rows)
        parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
    pathlib.Path(__file__).with_suffix(".json").write_text("{\n" + ",\n".join(parts) + "\n}\n")


main()
