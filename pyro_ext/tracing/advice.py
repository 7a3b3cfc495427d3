"""The advice of error messages, in the words of the function that was called."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """What to do about programs that an estimator cannot take. The default is that of an ELBO.

    :ivar one_at_a_time: how to run one particle at a time, as the end of a sentence.
    :ivar local_plate: what to do about a subsampled plate beside global latent sites; "{plate}"
        stands for its name.
    :ivar one_particle: a last way out for programs that only one particle suits; may be empty.
    :ivar enumeration: what to do about a site that is marked for enumeration.
    """

    one_at_a_time: str = "pass vectorize_particles=False"
    local_plate: str = (
        "If the sites outside of it are global, pass local_plate='{plate}', which draws them once "
        "and has a bound for each data point. Otherwise use all rows"
    )
    one_particle: str = ", or use num_particles=1"
    enumeration: str = (
        "Take the site out of the guide and mark it in the model, which sums it out, or draw it in "
        "the guide without infer={'enumerate': ...}. With num_particles=1, the sum over the guide "
        "is exact."
    )


#: The advice of functions that draw in chunks.
CHUNK_ADVICE = Advice(
    one_at_a_time="pass chunk_size=1",
    local_plate="Pass all rows of the plate, without subsample= or subsample_size=",
    one_particle="",
    enumeration=(
        "Take the site out of the guide and mark it in the model, which sums it out, or draw it in "
        "the guide without infer={'enumerate': ...}."
    ),
)
