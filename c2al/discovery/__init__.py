"""Cohort discovery: histograms of predictions per cohort, cuts, divergences with bounds, the choice."""
