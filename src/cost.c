#include "postgres.h"

#include "cost.h"
