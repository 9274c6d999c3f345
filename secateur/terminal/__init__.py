"""What a person sees: tables, progress, figures in words."""
