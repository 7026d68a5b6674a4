"""The learnable queries: `model.latent_queries` of the release, [1, Q, D] (spec 10.1)."""

from blip3o_jax.porting.convert import Rule

RULES = [Rule("latent_queries", "latent_queries", "squeeze")]
