"""The collector: the system of record of feedback. What it acknowledges is never lost and never counted twice."""
