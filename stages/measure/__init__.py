"""Measures: numbers of an image that are kept beside it and reject nothing."""
