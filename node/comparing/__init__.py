"""Recipes that are trained alike and held side by side."""
