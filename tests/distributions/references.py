"""Log densities, their gradients and distribution functions in the digits of mpmath's context."""

import mpmath

HALF = mpmath.mpf(1) / 2


def numbers(x):
    return [numbers(y) for y in x] if isinstance(x, list) else mpmath.mpf(x)


def sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


def bin_mass(x, loc, log_scale, low, high):
    """The mass of a bin, that of both tails, and the slopes of the log mass.

    The last is the size of the terms whose sum is the slope in the log scale.
    """
    t = mpmath.exp(-log_scale)
    a, b = (x + HALF - loc) * t, (x - HALF - loc) * t
    upper = sigmoid(-a) if x < high else 0
    lower = sigmoid(b) if x > low else 0
    if x == low:
        mass, inside = sigmoid(a), 0
    elif x == high:
        mass, inside = sigmoid(-b), 0
    else:
        mass, inside = sigmoid(a) * sigmoid(-b) * -mpmath.expm1(-t), t / mpmath.expm1(t)
    terms = (b * lower, -a * upper, -inside)
    return mass, lower + upper, (lower - upper) * t, sum(terms), sum(map(abs, terms))


def shares_of(parts):
    total = sum(parts)
    return total, [part / total for part in parts]


def weights_of(logits):
    largest = max(logits)
    return shares_of([mpmath.exp(x - largest) for x in logits])[1]


def log_of_total(masses, complements):
    """The log of a sum, with all digits also near one."""
    complement = sum(complements)
    return mpmath.log1p(-complement) if complement < HALF else mpmath.log(sum(masses))


def discretized_mixture(value, logits, loc, log_scale, low, high, factors=None):
    """The log mass, and its derivatives by the name of the parameter.

    :param value: a list of C integers.
    :param loc: K locations for each of the C channels; likewise log_scale.
    :param factors: the channel that each coefficient shifts, and by how much.
    """
    value, logits, loc, log_scale = map(numbers, (value, logits, loc, log_scale))
    weights = weights_of(logits)
    masses, complements, slopes = [], [], []
    for k, weight in enumerate(weights):
        bins = [bin_mass(x, loc[c][k], log_scale[c][k], low, high) for c, x in enumerate(value)]
        masses.append(weight * mpmath.fprod(mass for mass, *_ in bins))
        inside = sum(
            mpmath.log1p(-tails) if tails < HALF else mpmath.log(m) for m, tails, *_ in bins
        )
        complements.append(-weight * mpmath.expm1(inside))
        slopes.append([by[2:] for by in bins])
    _, shares = shares_of(masses)
    by_loc, by_log_scale, sizes = (
        [[r * s[c][i] for r, s in zip(shares, slopes, strict=True)] for c in range(len(value))]
        for i in range(3)
    )
    found = {
        "shares": shares,
        "logits": [r - w for r, w in zip(shares, weights, strict=True)],
        "loc": by_loc,
        "log_scale": by_log_scale,
        "sizes of log_scale": sizes,
    }
    if factors is not None:
        found["coeffs"] = [[x * mpmath.mpf(factor) for x in by_loc[c]] for c, factor in factors]
    return log_of_total(masses, complements), found


def discretized_cdf(value, logits, loc, log_scale, low, high):
    """The probability of at most ``value``."""
    if value >= high:
        return mpmath.mpf(1)
    if value < low:
        return mpmath.mpf(0)
    edge = mpmath.floor(mpmath.mpf(value)) + HALF
    terms = zip(weights_of(numbers(logits)), numbers(loc), numbers(log_scale), strict=True)
    return sum(w * sigmoid((edge - m) * mpmath.exp(-s)) for w, m, s in terms)


def normal_scale_mixture(value, scales, logits):
    """The log density, its derivatives by name, and the distribution function."""
    value, scales, logits = map(numbers, (value, scales, logits))
    weights = weights_of(logits)
    ratios = [value / s for s in scales]
    terms = list(zip(weights, scales, ratios, strict=True))
    density, shares = shares_of(
        [w * mpmath.exp(-z * z / 2) / s / mpmath.sqrt(2 * mpmath.pi) for w, s, z in terms]
    )
    found = {
        "shares": shares,
        "value": [-r * z / s for r, (_, s, z) in zip(shares, terms, strict=True)],
        "scales": [r * (z * z - 1) / s for r, (_, s, z) in zip(shares, terms, strict=True)],
        "logits": [r - w for r, w in zip(shares, weights, strict=True)],
    }
    # erfc does not take larger numbers. This tail is zero in every dtype.
    cdf = sum(w * mpmath.erfc(-min(z, 1000) / mpmath.sqrt(2)) / 2 for w, _, z in terms if z > -1000)
    return mpmath.log(density), found, cdf
