"""From roles and a template to a type for each tensor: rendering, rules, the plan and its size."""
