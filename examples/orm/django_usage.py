"""The usage table for Django: this class goes into models.py. managed = False, as the table is
aibilling.create_usage_table()'s; migrations leave it alone."""

import os

import django
from django.conf import settings

if not settings.configured:
    settings.configure(DATABASES={"default": {
        "ENGINE": "django.db.backends.postgresql", "NAME": os.environ["PGDATABASE"], "USER": os.environ["PGUSER"],
        "HOST": os.environ["PGHOST"], "PORT": os.environ["PGPORT"]}}, USE_TZ=True)
    django.setup()

from django.db import models  # noqa: E402


class Usage(models.Model):
    id = models.BigAutoField(primary_key=True)
    # NULL where the application sets nothing: the database's default applies then.
    external_id = models.TextField(unique=True, null=True)
    occurred_at = models.DateTimeField(null=True)
    provider = models.TextField(null=True)
    model = models.TextField(null=True)
    external_customer_id = models.TextField(null=True)
    input_tokens = models.BigIntegerField(null=True)
    cache_read_tokens = models.BigIntegerField(null=True)
    output_tokens = models.BigIntegerField(null=True)
    usage_format = models.TextField(null=True)
    raw_usage = models.JSONField(null=True)
    tags = models.JSONField(null=True)
    cost_nanos = models.BigIntegerField(null=True, editable=False)
    cost_cents = models.DecimalField(null=True, editable=False, max_digits=30, decimal_places=12)
    cost_status = models.TextField(null=True, editable=False)

    class Meta:
        managed = False
        db_table = "usage"
        app_label = "billing"


if __name__ == "__main__":
    row = Usage.objects.create(external_id="django-1", provider="openai", model="gpt-5", external_customer_id="user_123",
                               input_tokens=1200, output_tokens=350, tags={"feature": "chat"})
    row.refresh_from_db()  # what the database has set
    print("inserted", row.cost_cents, row.cost_status)
    row = Usage.objects.get(external_id="django-1")
    print("read", row.input_tokens, row.cost_nanos, row.tags)
