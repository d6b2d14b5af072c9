"""The TFDS builder, in a package directory of its own as TFDS asks for."""

from tca4rec_jax.data.tfds_rec.builder import RecSequences, Shard, read, write

__all__ = ["RecSequences", "Shard", "read", "write"]
