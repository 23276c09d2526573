"""Mixture of Experts in JAX."""
