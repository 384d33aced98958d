"""Prediction of patients' outcomes: pairs of patients, splits, baselines, and the choice among them."""
