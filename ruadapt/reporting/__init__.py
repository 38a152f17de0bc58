"""Tables and figures from result files, and what made them."""
