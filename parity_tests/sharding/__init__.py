"""Layers and models on meshes of eight virtual devices against one device."""
