"""What a finished run left: found, loaded, evaluated, asked."""
