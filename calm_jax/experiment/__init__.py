"""Experiments: many models trained and scored alike, with seeds, and the table of their scores."""
