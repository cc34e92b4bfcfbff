"""What gunicorn loads: `gunicorn --config python:api.gunicorn_conf api.wsgi:app`."""

from api.app import create_app
from wicore.config import load_settings

app = create_app(load_settings())
