"""Mixture of Experts in PyTorch, plain."""
