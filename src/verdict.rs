//! Probe results and thresholds to a verdict.
