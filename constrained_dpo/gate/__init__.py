"""`cdpo gate`: whether a policy may be released, as an exit code."""
