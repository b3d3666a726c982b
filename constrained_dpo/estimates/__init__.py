"""What may be claimed of a policy from samples: u, intervals, verdicts, the certificate."""
