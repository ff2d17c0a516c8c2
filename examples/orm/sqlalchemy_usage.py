"""The usage table for SQLAlchemy, as far as the application uses it."""

import os

from sqlalchemy import BigInteger, Column, DateTime, FetchedValue, Numeric, Text, create_engine
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session, declarative_base

Base = declarative_base()


class Usage(Base):
    __tablename__ = "usage"
    # What the database sets is fetched when it is asked for, or at once with eager_defaults (RETURNING).
    __mapper_args__ = {"eager_defaults": True}

    id = Column(BigInteger, primary_key=True, server_default=FetchedValue())
    external_id = Column(Text, unique=True, server_default=FetchedValue())
    occurred_at = Column(DateTime(timezone=True), server_default=FetchedValue())
    provider = Column(Text)
    model = Column(Text)
    external_customer_id = Column(Text)
    input_tokens = Column(BigInteger)
    cache_read_tokens = Column(BigInteger)
    output_tokens = Column(BigInteger)
    usage_format = Column(Text)
    raw_usage = Column(JSONB(none_as_null=True))
    tags = Column(JSONB, server_default=FetchedValue())
    cost_nanos = Column(BigInteger, server_default=FetchedValue())
    cost_cents = Column(Numeric, server_default=FetchedValue())
    cost_status = Column(Text, server_default=FetchedValue())


if __name__ == "__main__":
    driver = os.environ.get("SQLALCHEMY_DRIVER", "postgresql+psycopg2")
    # From PGHOST, PGDATABASE, PGUSER ...
    with Session(create_engine(f"{driver}://")) as session:
        row = Usage(external_id="sqlalchemy-1", provider="openai", model="gpt-5", external_customer_id="user_123",
                    input_tokens=1200, output_tokens=350, tags={"feature": "chat"})
        session.add(row)
        session.commit()
        print("inserted", row.cost_cents, row.cost_status)
        row = session.query(Usage).filter_by(external_id="sqlalchemy-1").one()
        print("read", row.input_tokens, row.cost_nanos, row.tags)
