"""Statistical assertions that state their standard error."""


def assert_mean(draws, expected, num_errors=4.5):
    """The mean of dim 0 equals ``expected`` within 4.5 standard errors."""
    error = draws.std(0) / len(draws) ** 0.5
    rounding = 1e-12  # where two estimators are the same number, the error is nothing else
    assert ((draws.mean(0) - expected).abs() <= num_errors * error + rounding).all(), (
        f"mean {draws.mean(0)}, expected {expected}, standard error {error}"
    )


def assert_mean_at_most(draws, limit, num_errors=4.5):
    """The mean of dim 0 exceeds ``limit`` by less than 4.5 standard errors."""
    error = draws.std(0) / len(draws) ** 0.5
    assert (draws.mean(0) - limit <= num_errors * error).all(), (
        f"mean {draws.mean(0)}, limit {limit}, standard error {error}"
    )
