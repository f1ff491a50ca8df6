"""Agreement with torch and with float64, layer roles, and what each environment supports."""
