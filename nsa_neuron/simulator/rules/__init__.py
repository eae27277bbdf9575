"""What is refused and how: the rule table, errors, options, and the run a thread is in."""
