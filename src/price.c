#include "postgres.h"

#include "price.h"
