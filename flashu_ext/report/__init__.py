"""The demo's measurements, their plots and the page that shows them."""
