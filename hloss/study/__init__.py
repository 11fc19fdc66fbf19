"""Many runs: the study file, its results as one table, statistics, claims, figures and the report."""
