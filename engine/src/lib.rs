//! The sans-io core: plans, merges, enlarges, retries, budgets.
