"""One function for each stage: options in, results out, nothing printed. Verbs, scripts and `apex demo` call these."""
